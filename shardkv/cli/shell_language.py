r"""What a line typed in the shell means: words, quotes, comments and ``;``. Pure.

Words are separated by blanks; single or double quotes keep blanks and semicolons inside a word. Outside of them the end
of a line is the end of a command, and of a comment. Backslashes are left alone, for they are the escapes of keys and
values; a quote inside a quoted word is written ``\x22`` or ``\x27``.
"""

from typing import Final

ALIASES: Final = {"split": ("admin", "split"), "transfer": ("admin", "transfer"), "snapshot": ("admin", "snapshot")}
"""Operations that the shell takes without ``admin``."""
COMMANDS: Final = (
    "get",
    "put",
    "del",
    "scan",
    "cas",
    "incr",
    "delete-range",
    "import",
    "export",
    "ranges",
    "nodes",
    "status",
    "leader",
    *ALIASES,
)
BUILT_IN: Final = ("help", "exit")


class SyntaxProblem(ValueError):
    """The line cannot be split into words."""


def parse(lines: str) -> list[list[str]]:
    """The commands of a line, or of several, each as its words. Raises SyntaxProblem for a quote without its end."""
    commands: list[list[str]] = [[]]
    word: list[str] | None = None
    quote = ""
    comment = False
    for character in lines:
        if comment and character != "\n":
            continue
        comment = False
        if quote:
            assert word is not None
            if character == quote:
                quote = ""
            else:
                word.append(character)
        elif character in "\"'":
            quote = character
            word = [] if word is None else word
        elif character.isspace() or character == ";":
            if word is not None:
                commands[-1].append("".join(word))
                word = None
            if character in ";\n":
                commands.append([])
        elif character == "#" and word is None:
            comment = True
        else:
            word = [] if word is None else word
            word.append(character)
    if quote:
        raise SyntaxProblem(f"the quote {quote} has no end")
    if word is not None:
        commands[-1].append("".join(word))
    return [command for command in commands if command]


def quoted(word: str) -> str:
    """A word as it has to be typed, for completions."""
    if word and not any(character.isspace() or character in "\"';#" for character in word):
        return word
    return '"' + word.replace('"', "\\x22") + '"'

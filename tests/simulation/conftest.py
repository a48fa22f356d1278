"""The example application is run by a test of its own, outside of this tree; it is no part of this suite."""

collect_ignore = ["example_app"]

"""Addresses, where the protocol's users look for them; :mod:`shardkv.address` holds them, for every layer."""

from shardkv.address import Address, parse_address, parse_addresses

__all__ = ["Address", "parse_address", "parse_addresses"]

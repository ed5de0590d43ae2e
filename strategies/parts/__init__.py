"""Modules that several strategies share."""

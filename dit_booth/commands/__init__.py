"""The programs behind `dit-booth`: one file a command, thin over the library.

program.py is the frame of those that work and tell what they made.
"""

"""The programs behind `dit-booth`: one file a command, thin over the library."""

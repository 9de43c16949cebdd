"""The steps of a batch as plain functions; Luigi is not known here."""

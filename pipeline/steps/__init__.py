"""The steps of a batch as plain functions, without Luigi."""

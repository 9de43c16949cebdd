"""A model of what commands make of a database and a bucket, and random sequences of commands that are compared with it.

dataset.py      the files of a sequence, which change
batches.py      the model: batches, and what readers see of them
machine.py      loads, resets, an app's rows, and what must hold after each command
array.py        the commands of an array engine, beside each other and beside a load
disturbances.py damage, keys that are wrong, migrations again
people.py       the same in the project of an app whose people work between any two commands
older.py        the same in the project of an app with trays that an older script loaded
"""

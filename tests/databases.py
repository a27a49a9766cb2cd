"""A folder of databases as Spider's."""

import sqlite3


def make_pets(folder):
    """A folder of an odd name with the database pets; returns its path."""
    base = folder / "data bases?#%41"
    (base / "pets").mkdir(parents=True)
    connection = sqlite3.connect(base / "pets" / "pets.sqlite")
    connection.execute("CREATE TABLE pet (name TEXT, age INTEGER)")
    pets = [("Tom", 3), ("Kim", 1), ("Kim", 1), (None, 2)]
    connection.executemany("INSERT INTO pet VALUES (?, ?)", pets)
    connection.execute("INSERT INTO pet VALUES (CAST(x'ff41' AS TEXT), 9)")  # not UTF-8
    connection.commit()
    connection.close()
    return base

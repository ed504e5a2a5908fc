"""The exercises of the lessons: how they answer back (exercises.py), and one file of them for each notebook."""

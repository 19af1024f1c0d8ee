"""Properties that every defense and attack must have, as functions; for bundled methods and plug-ins alike.

There is one function per property, named after it, in `defenses.py` and `attacks.py`. Each takes a method (a class with
parameters) and a `Setting` (a small model, concepts with images, a folder), and raises `Nonconforming` with one
sentence. `python -m harness check my_defense.py` runs them all.
"""

"""What every defense and attack must satisfy, as functions: the bundled ones are held to it, and an outsider's too.

One function a property, in `defenses.py` and `attacks.py`; its name says the property. Each takes a method (a class
with parameters) and a `Setting` (a small model, concepts with images, a folder), and raises `Nonconforming` with one
sentence. `python -m harness check my_defense.py` runs them all.
"""

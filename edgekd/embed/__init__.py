"""``edgekd embed``: programs around a bundle. `project` writes them, `command` is the command line.

The templates lie in the folders beside this file, one a language; ``native`` is shared by C and C++.
Nothing is imported here, because the command line must start fast.
"""

"""Real inputs, mutated, at every door through which data comes from outside.

The law: a door takes an input or refuses it by a typed error. It touches no file outside the given folder, starts no
program, unpickles nothing, and ends within :data:`tests.hostile.drive.LONGEST_S` and
:data:`tests.hostile.drive.MOST_BYTES`. An input is named by its surface, a seed and a number, and made anew from them.
"""

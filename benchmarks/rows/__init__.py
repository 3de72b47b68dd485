"""The rows, one module each; `ROW` lists the contests.

The interpreters of the peers' environments import these modules too. At module level, they therefore import only the
standard library and the harness; functions import the libraries that they use.
"""

# %% exercise="one" difficulty=1
### BEGIN SOLUTION
one = 1
### END SOLUTION

# %% check="one"
assert one == 1, "One is one"

# %% mistake="two" of="one"
one = 2

# %% alternative="an alias"
one = 1

# %% exercise="One thing" difficulty=1 minutes=5
### BEGIN SOLUTION
one = 1
### END SOLUTION

# %% exercise="one" difficulty=1 minutes=5
### BEGIN SOLUTION
one = 1
### END SOLUTION

# %% check="one" points=0
assert one == 1, "One is one"

# %% check="one" points="2"
assert one == 1, "One is one"

# %% mistake="two" of="one" says=" "
one = 2

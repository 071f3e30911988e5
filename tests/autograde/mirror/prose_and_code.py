# %% [markdown]
# # Prose, code, parameters
#
# A formula $a < b$, a `code` span, a line that ends in a hash #

# %% tags=["parameters"]
steps = 3  # what papermill may set
model_id = "shipped"

# %%
import math

print(math.pi)

# %% [markdown]
# Twice the same demo:

# %%
print(steps)

# %%
print(steps)

# %% tags=["hide-input", "long"]
# %time sum(range(steps))

# %% [markdown]
# # Title

# %% [markdown]
# It rose from {{before}} to {{after:interval}} in {{run:seconds}} s.

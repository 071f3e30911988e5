# %% [markdown]
# It rose from {{before}} to {{after}} ({{after:interval}}), in {{run:seconds}} s and {{run:peak_mib}} MiB.

# %%
"{{before}} in code is left alone"

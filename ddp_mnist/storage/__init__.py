"""The run directory: what it holds, who may write, how a run is saved and continued."""

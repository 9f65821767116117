"""The processes of a job: how they start, meet, stop and end."""

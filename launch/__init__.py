"""Starting the job elsewhere: submitit, files for `accelerate launch`, and the check before a job is submitted."""

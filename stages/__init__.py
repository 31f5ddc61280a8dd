"""The stages of the pipeline: files are verbs that run, folders are what they import."""

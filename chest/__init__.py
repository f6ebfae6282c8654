"""What the stages of the pipeline share: one small module for each subject."""

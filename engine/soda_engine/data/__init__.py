"""Images in: data sets, loaders whose position is one number, and the random views that training compares.

Import from the modules: `datasets` opens a source, `loaders` batches it, `views` augments a batch.
"""

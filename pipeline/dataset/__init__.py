"""The dataset on disk: folders, documents, photos and annotations, without a database or a network."""

"""Files that are whole or absent: tensors, fingerprints, the folder of profiles."""

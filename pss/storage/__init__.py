"""Files that are whole or absent: tensors, fingerprints, the folder of profiles and the pass that fills it.

=================  ===================================================================================================
``whole``          `write_whole`: a file whole or not at all
``digests``        `digest` of any content, `key_of` what a folder in the cache is made of
``fingerprints``   `fingerprint` of a model, `name_of` a function, `name_of_data`, `hash_state`
``tensors``        `pack` and `unpack` safetensors files with a checksum, `load_tensors` of strangers, `bytes_of`
``folder``         the files of a store of profiles: how it is begun, written, checked, finished, taken away
``records``        what such a store notes of each row
``store``          how it is read: `ProfileStore`, `blocks`, `map_blocks`
``references``     `read_reference`, `write_reference`: files of what is usual, ours and the published ones
``passes``         `store_rows`: a pass over a data set, resumed and shared; `choose_batch_size`
``places``         `cache_folder`, `checkout_data`
``cache``          `cached`: tensors from the cache, or made and kept there
=================  ===================================================================================================

Imported module by module: ``whole`` and ``digests`` load no torch. What is computed, and why, this room does not know.
"""

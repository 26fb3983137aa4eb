"""Attention of ragged query rows over paged keys and values: verify rows and prefill chunks in one launch."""

"""Building blocks of the models: linear, normalisation, rotary embedding, paged attention."""

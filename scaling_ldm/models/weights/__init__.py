"""Published weights in and out: safetensors layouts of others <-> our trees."""

"""More than one machine, on Ray. Nothing else imports this package, and nothing in it loads Ray before it is used.

    online      client ──> Ray's proxy ──> ingress ───────────────> a deployment for each model
                                           dialects, gate, service   engine: packing, lanes, cache
                                           remote_engine             host

    offline     files ──> partitions ──> Ray Data over actors that hold an engine ──> a Parquet file for each partition

`ray_serve` and `ray_data` are the two that meet Ray; the rest works, and is tested, without it.
"""

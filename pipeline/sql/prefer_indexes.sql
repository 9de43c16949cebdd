-- Until the end of the transaction: right after a bulk load there are no statistics yet, and a scan looks cheap.
SELECT set_config('enable_seqscan', 'off', true)

-- Until the end of the transaction: a client whose machine has vanished is noticed after a minute, not after two hours.
SELECT set_config('tcp_keepalives_idle', '30', true), set_config('tcp_keepalives_interval', '10', true),
    set_config('tcp_keepalives_count', '3', true)

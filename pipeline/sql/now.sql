SELECT clock_timestamp() AS now, current_setting('server_version_num')::int AS version

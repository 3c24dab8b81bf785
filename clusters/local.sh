#!/bin/sh
# A Ray head on this machine: dashboard on loopback, token authentication on. Ctrl-C ends it.
# More options go to `ray start`: clusters/local.sh --num-cpus 8
set -eu
umask 077 # the token is this user's alone
export RAY_AUTH_MODE=token
export RAY_JOB_STOP_WAIT_TIME_S=60 # a stopped job ends its actors itself; Ray would kill it after 3 s
ray get-auth-token --generate >/dev/null # into ~/.ray/auth_token, unless there is one
exec ray start --head --block --include-dashboard=true --dashboard-host=127.0.0.1 --disable-usage-stats "$@"

# Sourced by the launchers. as_child COMMAND... runs it so that SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP reach it as SIGTERM
# also where only this shell gets them, and answers with its exit code once it has ended; 143 where the signal ended it.

STOPPED=143
trap 'exit "$STOPPED"' TERM INT USR1 HUP # between commands

as_child() {
    local code= now asked= signalled child
    "$@" &
    child=$!
    trap 'asked=yes signalled=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT USR1 HUP
    while :; do
        signalled= now=0
        wait "$child" || now=$?
        [ -z "$code" ] || [ "$now" != 127 ] || break # the wait before this one had its code
        code=$now
        [ -n "$signalled" ] || break # else the signal may have ended the wait, not the command
    done
    trap 'exit "$STOPPED"' TERM INT USR1 HUP
    case "$asked$code" in yes130 | yes138 | yes129) code=$STOPPED ;; esac
    return "$code"
}

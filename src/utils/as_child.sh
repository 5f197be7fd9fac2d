# Sourced by the launchers. as_child COMMAND... runs it so that SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP reach it as SIGTERM
# also where only this shell gets them, and answers with its exit code once it has ended; 143 where the signal ended it.

STOPPED=143
trap 'exit "$STOPPED"' TERM INT USR1 HUP # between commands

as_child() {
    local code= now asked= signalled child=
    trap 'asked=yes signalled=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT USR1 HUP
    "$@" &
    child=$!
    [ -z "$asked" ] || kill -TERM "$child" 2>/dev/null || true # asked before there was a child to ask
    while :; do
        signalled= now=0
        wait "$child" || now=$?
        [ -z "$code" ] || [ "$now" != 127 ] || break # the wait before this one had its code
        code=$now
        [ -n "$signalled" ] || break # else the signal may have ended the wait, not the command
    done
    trap 'exit "$STOPPED"' TERM INT USR1 HUP
    # -1: bash lost the code, where the signal came at the very end
    case "$asked$code" in yes130 | yes138 | yes129 | yes-1) code=$STOPPED ;; esac
    return "$code"
}

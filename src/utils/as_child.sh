# Sourced by the launchers. as_child COMMAND... runs it so that SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP reach it also where
# only this shell gets them, and answers with its exit code once it has ended; 143 where the signal ended it. Ctrl-C
# arrives as SIGTERM: bash starts commands in the background deaf to the other.

STOPPED=143
trap 'exit "$STOPPED"' TERM INT USR1 HUP # between commands

_ask() { # with the variables of as_child, in which it is called
    asked=$1 signalled=yes
    [ -z "$child" ] || kill -"$1" "$child" 2>/dev/null || true
}

as_child() {
    local code= now asked= signalled child=
    trap '_ask TERM' TERM INT
    trap '_ask USR1' USR1
    trap '_ask HUP' HUP
    "$@" &
    child=$!
    [ -z "$asked" ] || kill -"$asked" "$child" 2>/dev/null || true # asked before there was a child to ask
    while :; do
        signalled= now=0
        wait "$child" || now=$?
        [ -z "$code" ] || [ "$now" != 127 ] || break # the wait before this one had its code
        code=$now
        [ -n "$signalled" ] || break # else the signal may have ended the wait, not the command
    done
    trap 'exit "$STOPPED"' TERM INT USR1 HUP
    # -1: bash lost the code, where the signal came at the very end
    case "${asked:+yes}$code" in yes130 | yes138 | yes129 | yes-1) code=$STOPPED ;; esac
    return "$code"
}

# fish completion for p2pclaude-daemon

complete -c p2pclaude-daemon -f
complete -c p2pclaude-daemon -s r -l root-dir -x -a '(__fish_complete_directories)' -d 'serve directories below this one only'
complete -c p2pclaude-daemon -l data-dir -x -a '(__fish_complete_directories)' -d 'keys, pairing URL and sessions'
complete -c p2pclaude-daemon -l print-url -d 'print the pairing URL and exit'
complete -c p2pclaude-daemon -l bootstrap -x -d 'start from these nodes of the DHT'
complete -c p2pclaude-daemon -l host -x -d 'address to bind'
complete -c p2pclaude-daemon -l port -x -d 'UDP port to bind'
complete -c p2pclaude-daemon -l private -d 'be a DHT of its own'
complete -c p2pclaude-daemon -l relay -x -d 'meet clients at this blind relay'
complete -c p2pclaude-daemon -l claude -r -F -d 'the claude to run'
complete -c p2pclaude-daemon -l permission-mode -x -a 'default acceptEdits bypassPermissions plan' -d 'permission mode of new sessions'
complete -c p2pclaude-daemon -l model -x -a 'opus sonnet haiku' -d 'model of new sessions'
complete -c p2pclaude-daemon -l refresh-interval -x -d 'announce so often'
complete -c p2pclaude-daemon -l max-sessions -x -d 'run so many sessions at a time'
complete -c p2pclaude-daemon -s v -l verbose -d 'say what is going on'
complete -c p2pclaude-daemon -s h -l help -d 'show the usage'
complete -c p2pclaude-daemon -l version -d 'show the version'

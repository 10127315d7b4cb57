# fish completion for p2pclaude-send

complete -c p2pclaude-send -F
complete -c p2pclaude-send -s s -l session -x -d 'send to this session'
complete -c p2pclaude-send -s C -l directory -x -a '(__fish_complete_directories)' -d 'start the session in this directory'
complete -c p2pclaude-send -l model -x -a 'opus sonnet haiku' -d 'model of the new session'
complete -c p2pclaude-send -l permission-mode -x -a 'default acceptEdits bypassPermissions plan' -d 'permission mode of the new session'
complete -c p2pclaude-send -l now -d 'end a running turn'
complete -c p2pclaude-send -l ask -d 'let the new session ask for permission'
complete -c p2pclaude-send -s w -l wait -d 'wait for the answer and print it'
complete -c p2pclaude-send -l lines -d 'each line of stdin is a message, print each answer'
complete -c p2pclaude-send -l json -d 'print the whole result object'
complete -c p2pclaude-send -s t -l timeout -x -d 'wait so long for a connection and for answers'
complete -c p2pclaude-send -l bootstrap -x -d 'start from these nodes of the DHT'
complete -c p2pclaude-send -s v -l verbose -d 'say what is going on'
complete -c p2pclaude-send -s h -l help -d 'show the usage'
complete -c p2pclaude-send -l version -d 'show the version'

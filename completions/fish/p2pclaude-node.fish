# fish completion for p2pclaude-node

complete -c p2pclaude-node -f
complete -c p2pclaude-node -l bootstrap -x -d 'join the network of these nodes'
complete -c p2pclaude-node -l public -d 'join the public network'
complete -c p2pclaude-node -l private -d 'be a network of its own'
complete -c p2pclaude-node -l host -x -d 'address to bind'
complete -c p2pclaude-node -l port -x -d 'UDP port to bind'
complete -c p2pclaude-node -l public-host -x -d 'address at which others reach the node'
complete -c p2pclaude-node -l relay -d 'relay connections between peers'
complete -c p2pclaude-node -l key-file -r -F -d 'the relay\'s key pair'
complete -c p2pclaude-node -l print-key -d 'print the relay\'s public key and exit'
complete -c p2pclaude-node -l max-connections -x -d 'serve so many clients'
complete -c p2pclaude-node -l max-links -x -d 'link so many pairs'
complete -c p2pclaude-node -l max-bytes -x -d 'end a link that has carried so much'
complete -c p2pclaude-node -l max-seconds -x -d 'end a link that is so old'
complete -c p2pclaude-node -s v -l verbose -d 'say what is going on'
complete -c p2pclaude-node -s h -l help -d 'show the usage'
complete -c p2pclaude-node -l version -d 'show the version'

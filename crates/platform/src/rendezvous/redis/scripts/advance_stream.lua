-- stream, rank, state, remember
return advance(ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], false)

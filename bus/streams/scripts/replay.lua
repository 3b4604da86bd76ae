-- replay: copy entries of a stream into the inbox of one group, each once per run.
-- KEYS  1 stream  2 the group's inbox  3 the run's memory for this stream
-- ARGV  1 group  2 run  3 most entries of the inbox  4 seconds to remember  5.. entry ids, rising
-- Returns {copied, gone, 1 if the inbox is full, copied by this run in all}. Ids up to the one that
-- the memory holds were copied before and are passed over. gone: trimmed or deleted meanwhile.
-- Atomic  because a repeat, after a lost answer or by a new process, must find in the memory exactly
--         what is in the inbox.
-- include _ids
local memory = redis.call('GET', KEYS[3])
local last, total = nil, 0
if memory then
  last, total = string.match(memory, '^(%S+) (%d+)$')
  total = tonumber(total)
end
local room = tonumber(ARGV[3]) - redis.call('XLEN', KEYS[2])
local copied, gone, full = 0, 0, 0
for i = 5, #ARGV do
  local id = ARGV[i]
  if not last or before(last, id) then
    if copied >= room then
      full = 1
      break
    end
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    if entry then
      local fields = entry[2]
      for _, word in ipairs({'origentry', id, 'attempts', '0', 'due', '0', 'run', ARGV[2]}) do
        fields[#fields + 1] = word
      end
      redis.call('XADD', KEYS[2], '*', unpack(fields))
      copied = copied + 1
    else
      gone = gone + 1
    end
    last = id
  end
end
if copied + gone > 0 then
  redis.call('SET', KEYS[3], last .. ' ' .. string.format('%.0f', total + copied), 'EX', ARGV[4])
end
if copied > 0 then redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[1], '0') end -- it may exist
return {copied, gone, full, total + copied}

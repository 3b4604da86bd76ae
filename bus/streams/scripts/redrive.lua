-- redrive: move dead letters of a group into its inbox.
-- KEYS  1 dead letters  2 the group's inbox  3 the run's memory for this stream
-- ARGV  1 group  2 run  3 number of the call within the run  4 most entries of the inbox
--       5 seconds to remember, then per letter: its id; the id that the entry had in its stream;
--         how many of its values go, from the first on, or, below 0, how many arguments follow
--         that go instead; these
-- Returns per letter 1 moved, 0 it is not there (any more), 2 no room in the inbox, 3 it has more
--         fields than a script can pass on. A repeat of the run's last call is answered as before.
-- Error   STALE: a later call of the run was made before. OOM, NOPERM, ...: nothing was done.
-- Atomic  because a letter must be in one of the two places, whatever crashes and however many
--         redrive it.
local memory = redis.call('GET', KEYS[3])
if memory then
  local number, answers = string.match(memory, '^(%d+) (%d+)$')
  if number == ARGV[3] then
    local answer = {}
    for digit in string.gmatch(answers, '%d') do answer[#answer + 1] = tonumber(digit) end
    return answer
  elseif number and tonumber(number) > tonumber(ARGV[3]) then
    return redis.error_reply('STALE call ' .. ARGV[3] .. ', the last one was ' .. number)
  end
end
local room = tonumber(ARGV[4]) - redis.call('XLEN', KEYS[2])
local answer, at, moved = {}, 6, 0
while at <= #ARGV do
  local id, origin, values = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local first = at + 3
  at = first + math.max(0, -values)
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  local verdict = 1
  if not entry then
    verdict = 0
  elseif moved >= room then
    verdict = 2
  elseif math.abs(values) > 7000 then -- only others write such
    verdict = 3
  else
    if moved == 0 then
      -- The group may exist. Whatever forbids one of the writes says so before the first.
      local made = redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[1], '0', 'MKSTREAM')
      if made['err'] and not string.find(made['err'], 'BUSYGROUP', 1, true) then return made end
      redis.call('XDEL', KEYS[1], '0-0')
      redis.call('SET', KEYS[3], ARGV[3] .. ' ', 'EX', ARGV[5])
    end
    local fields
    if values < 0 then
      fields = {unpack(ARGV, first, at - 1)}
    else
      fields = {unpack(entry[2], 1, values)}
    end
    for _, word in ipairs({'origentry', origin, 'attempts', '0', 'due', '0', 'run', ARGV[2]}) do
      fields[#fields + 1] = word
    end
    redis.call('XADD', KEYS[2], '*', unpack(fields))
    redis.call('XDEL', KEYS[1], id)
    moved = moved + 1
  end
  answer[#answer + 1] = verdict
end
if moved > 0 then
  redis.call('SET', KEYS[3], ARGV[3] .. ' ' .. table.concat(answer), 'EX', ARGV[5])
end
return answer

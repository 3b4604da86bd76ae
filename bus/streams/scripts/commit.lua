-- commit: apply effects, in one step with the acks of their deliveries, or once as a transaction.
-- KEYS  1 stream or inbox  2 dead letters; of a transaction 1 its memory; then all it touches
-- ARGV  1 group, '' for a transaction  2 consumer, or the transaction's sequence
--       3 seconds to remember a transaction
--       4 msgpack: {streams, units}. streams: {{stream, key of its overrun counts, events, keep,
--         slack, most, drop}, ...}. A unit is a delivery, or the transaction: {{entry id, attempt,
--         id the entry had in its stream, types, places, binaries}, commands}.
--         types: {key, type it must have if it exists, ...}. places: {command, stream to which it
--         appends, ...}. commands: {{tests, {name, key, ...}}, ...}. tests: {command, test, low,
--         high, ...}
--         5.. values that are no UTF-8, which msgpack cannot carry to Lua; binaries: {command,
--         place in it or, below 0, in its tests, which of them, ...}
-- Returns {{answer per delivery}, {stream, who pins it, ghosts, dropped, ...}, {stream, events
--         appended, ...}}. An answer is
--         1 done; 0 not this worker's any more, or done before: nothing was done;
--         {2, stream, who pins it} no room there: nothing was done;
--         {3, error, applied} a command failed: those before it stay, and the delivery is a dead
--         letter now, so that they are never applied again; {1, ran, replies} of a transaction.
--         ran, per command: 1 yes, 0 no, 2 yes, and its reply is a whole number written as text.
-- Error   STALE: a later batch of this sender was applied before. OOM, READONLY, ...: the server
--         takes no writes; NOPERM: the user may not: nothing was done at all.
-- Atomic  because that is the promise.
-- include _owned
local group, owner, transaction = ARGV[1], ARGV[2], ARGV[1] == ''
if transaction then
  local memory = redis.call('GET', KEYS[1])
  if memory then
    local last = cmsgpack.unpack(memory)
    if last[1] == owner then return {{last[2]}, {}, {}} end
    if tonumber(owner) < tonumber(last[1]) then
      return redis.error_reply('STALE transaction ' .. owner .. ', the last one was ' .. last[1])
    end
  end
end

-- Nothing may go wrong with a dead letter once effects were applied.
if not transaction then
  local kind = redis.call('TYPE', KEYS[2])['ok']
  if kind ~= 'none' and kind ~= 'stream' then
    return redis.error_reply('WRONGTYPE ' .. KEYS[2] .. ' is a ' .. kind)
  end
end

local reads = {GET = true, HGET = true, SISMEMBER = true, SCARD = true, ZSCORE = true,
  ZCARD = true, EXISTS = true}
local wrote = false -- a server that takes no writes says so at the first one
local function unwritten(err)
  if wrote then return false end
  for _, code in ipairs({'OOM ', 'READONLY ', 'MISCONF ', 'NOREPLICAS ', 'NOPERM ',
      'ACL failure', "executing the script can't"}) do
    if string.find(err, code, 1, true) then return true end
  end
  return false
end

local function holds(reply, test, low, high)
  if reply == nil then return false end -- the command it is about was skipped
  if test == 'missing' then return not reply end
  if test == 'present' then return reply and true end
  if not reply then return false end
  if test == 'between' then
    if type(reply) == 'string' and string.find(reply, '[xX%s]') then return false end
    local n = tonumber(reply)
    return n and n >= tonumber(low) and n <= tonumber(high)
  end
  if type(reply) == 'table' then reply = reply['ok'] end
  if type(reply) == 'number' then reply = string.format('%.0f', reply) end
  return (reply == low) == (test == 'equals')
end

-- bury(id, attempt, origin, err, applied): the dead letter of a delivery that failed half way. The
-- limit on dead letters is no matter here: it must never run again by itself.
local function bury(id, attempt, origin, err, applied)
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  local fields = entry and entry[2] or {}
  if string.sub(KEYS[1], -1) ~= '}' then
    local own = {origentry = true, attempts = true, due = true, run = true}
    while own[fields[#fields - 1]] do
      own[fields[#fields - 1]] = nil
      fields[#fields] = nil
      fields[#fields] = nil
    end
  end
  if #fields > 2000 then fields = {'deadfields', cmsgpack.pack(fields)} end
  local time = redis.call('TIME')
  local why = {'deadreason', 'effects-failed', 'deaderror', 'EffectsFailed: ' .. err,
    'deadtraceback', '', 'deadattempts', attempt, 'deadentry', origin, 'deadapplied', applied,
    'deadtime', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))}
  for _, part in ipairs(why) do fields[#fields + 1] = part end
  redis.call('XADD', KEYS[2], '*', unpack(fields))
end

local streams, units = unpack(cmsgpack.unpack(ARGV[4]))
local looked, room, pins, broken = {}, {}, {}, {}
for _, row in ipairs(streams) do
  local stream, overrun, total, keep, slack, most, drop = unpack(row)
  local kind = redis.call('TYPE', stream)['ok']
  if kind ~= 'none' and kind ~= 'stream' then
    broken[stream] = kind
  else
    local length, found
    -- include _look
    if found then
      looked[#looked + 1] = stream
      for _, part in ipairs(found) do looked[#looked + 1] = part end
      pins[stream] = found[1]
    end
    room[stream] = most - length
  end
end

-- full(places) -> answer if there is no room for these events, else nil: then it is taken.
local function full(places)
  for i = 2, #places, 2 do
    local stream = places[i]
    room[stream] = room[stream] - 1
    if room[stream] < 0 then
      for k = 2, i, 2 do room[places[k]] = room[places[k]] + 1 end
      return {2, stream, pins[stream] or {}}
    end
  end
end

-- mistyped(types, places) -> what is wrong with the types of keys, else nil.
local function mistyped(types, places)
  for i = 1, #types, 2 do
    local kind = redis.call('TYPE', types[i])['ok']
    if kind ~= 'none' and kind ~= types[i + 1] then
      return 'WRONGTYPE ' .. types[i] .. ' is a ' .. kind .. ', not a ' .. types[i + 1]
    end
  end
  for i = 2, #places, 2 do
    if broken[places[i]] then
      return 'WRONGTYPE ' .. places[i] .. ' is a ' .. broken[places[i]] .. ', not a stream'
    end
  end
end

local mine = transaction
if not transaction then
  local ids = {}
  for i, unit in ipairs(units) do ids[i] = unit[1][1] end
  mine = owned(KEYS[1], group, owner, ids)
end
local answers, done, added = {}, {}, {}
for i, unit in ipairs(units) do
  local id, attempt, origin, types, places, binaries = unpack(unit[1])
  local commands = unit[2]
  local answer = 0
  if transaction or mine[id] then
    local wrong = mistyped(types, places)
    answer = not wrong and full(places) or nil
    if not answer then
      for k = 1, #places, 2 do commands[places[k]][2][2] = places[k + 1] end
      for k = 1, #binaries, 3 do
        local command, place = commands[binaries[k]], binaries[k + 1]
        local values = place < 0 and command[1] or command[2]
        values[math.abs(place)] = ARGV[4 + binaries[k + 2]]
      end
      local replies, ran, applied = {}, {}, {}
      for n, command in ipairs(wrong and {} or commands) do
        local tests, args = command[1], command[2]
        local met = true
        for t = 1, #tests, 4 do
          met = met and holds(replies[tests[t]], tests[t + 1], tests[t + 2], tests[t + 3])
        end
        if met then
          local reply = redis.pcall(unpack(args))
          if type(reply) == 'table' and reply['err'] then
            if unwritten(reply['err']) then return reply end
            wrong = args[1] .. ' ' .. args[2] .. ': ' .. reply['err']
            break
          end
          ran[n] = 1
          if type(reply) == 'number' and math.abs(reply) > 9007199254740991 then
            -- Only counters get so far, and a script's numbers do not: the server has it as text.
            reply = args[1] == 'INCRBY' and redis.call('GET', args[2])
              or redis.call('HGET', args[2], args[3])
            ran[n] = 2
          end
          replies[n] = reply
          if not reads[args[1]] then
            wrote = true
            if args[1] == 'XADD' then added[args[2]] = (added[args[2]] or 0) + 1 end
            applied[#applied + 1] = args[1] .. ' ' .. args[2]
          end
        else
          ran[n] = 0
        end
      end
      answer = 1
      if wrong then
        answer = {3, wrong, table.concat(applied, '\n')}
        if not transaction then bury(id, attempt, origin, wrong, answer[3]) end
      elseif transaction then
        for n = 1, #commands do
          if replies[n] == nil then replies[n] = false end
        end
        answer = {1, ran, replies}
      end
      if not transaction then
        done[#done + 1] = id
        mine[id] = nil
      end
    end
  end
  answers[i] = answer
end
if #done > 0 then finish(KEYS[1], group, done) end
if transaction and answers[1][1] ~= 2 then
  redis.call('SET', KEYS[1], cmsgpack.pack({owner, answers[1]}), 'EX', ARGV[3])
end
local appended = {}
for stream, events in pairs(added) do
  appended[#appended + 1] = stream
  appended[#appended + 1] = events
end
return {answers, looked, appended}

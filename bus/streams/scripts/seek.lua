-- seek: set how far a group has been given a stream.
-- KEYS  1 stream
-- ARGV  1 group  2 the last-delivered id it must have, '' for any, '<' for any before the one it
--       gets, '>' for any beyond  3 the one it gets
--       4 how many entries that is since the stream began, '' if the server is not to be told
--       5 1 if that only holds while there is an entry up to there
-- Returns the last-delivered id it had; nothing was done if that is not the one it must have. Nil,
--         and nothing was done, if there is no such entry any more.
-- Atomic  because its workers read on meanwhile, and would be given entries twice.
-- include _ids
local function may(was)
  if ARGV[2] == '<' then return before(was, ARGV[3]) end
  if ARGV[2] == '>' then return before(ARGV[3], was) end
  return ARGV[2] == '' or ARGV[2] == was
end
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local row = {}
  for i = 1, #flat, 2 do row[flat[i]] = flat[i + 1] end
  if row['name'] == ARGV[1] then
    local was = row['last-delivered-id']
    if not may(was) then return was end
    if ARGV[5] == '1' and #redis.call('XRANGE', KEYS[1], '-', ARGV[3], 'COUNT', 1) == 0 then
      return false
    end
    if ARGV[4] == '' then
      redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], ARGV[3])
    else
      redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], ARGV[3], 'ENTRIESREAD', ARGV[4])
    end
    return was
  end
end
return redis.error_reply('NOGROUP there is no such group')

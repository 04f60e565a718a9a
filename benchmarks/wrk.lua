-- Draws whole HTTP requests from a list made beforehand: a request costs wrk one table look-up.
-- Arguments: the folder with requests.bin, lengths.txt (bytes of each request, in order) and draws.txt (which of
-- them, 0-based, in the order to send), and where in the draws to begin.

local requests, draws, position = {}, {}, 0

function init(args)
  local folder = args[1]
  local file = assert(io.open(folder .. "/requests.bin", "rb"))
  for line in io.lines(folder .. "/lengths.txt") do
    requests[#requests + 1] = assert(file:read(tonumber(line)))
  end
  file:close()
  for line in io.lines(folder .. "/draws.txt") do
    draws[#draws + 1] = tonumber(line) + 1
  end
  position = tonumber(args[2]) % #draws
end

function request()
  position = position % #draws + 1
  return requests[draws[position]]
end

function done(summary, latency, _)
  local failed = summary.errors
  io.write(string.format(
    '\n{"requests":%d,"duration_us":%d,"bytes":%d,"p50_us":%d,"p99_us":%d,"mean_us":%.1f,"bad_status":%d,"bad_socket":%d}\n',
    summary.requests, summary.duration, summary.bytes, latency:percentile(50), latency:percentile(99), latency.mean,
    failed.status, failed.connect + failed.read + failed.write + failed.timeout
  ))
end

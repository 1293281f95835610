# Downloads, verifies by hash and compiles the libraries that a cross-compiling system lacks.
include(FetchContent)
if(POLICY CMP0135)
  cmake_policy(SET CMP0135 NEW)
endif()
set(FETCHCONTENT_QUIET OFF)

FetchContent_Declare(json
  URL https://github.com/nlohmann/json/archive/refs/tags/v3.11.3.tar.gz
  URL_HASH SHA256=0d8ef5af7f9794e3263480193c491549b2ba6cc74bb018906202ada498a79406
  SOURCE_SUBDIR include)  # headers alone: nothing of it is built

set(PCRE2_BUILD_PCRE2GREP OFF CACHE INTERNAL "")
set(PCRE2_BUILD_TESTS OFF CACHE INTERNAL "")
FetchContent_Declare(pcre2
  URL https://github.com/PCRE2Project/pcre2/releases/download/pcre2-10.46/pcre2-10.46.tar.gz
  URL_HASH SHA256=8d28d7f2c3b970c3a4bf3776bcbb5adfc923183ce74bc8df1ebaad8c1985bd07)

set(UTF8PROC_INSTALL OFF CACHE INTERNAL "")
FetchContent_Declare(utf8proc
  URL https://github.com/JuliaStrings/utf8proc/archive/refs/tags/v2.11.3.tar.gz
  URL_HASH SHA256=abfed50b6d4da51345713661370290f4f4747263ee73dc90356299dfc7990c78)

FetchContent_MakeAvailable(json pcre2 utf8proc)
set(JSON_INCLUDE "${json_SOURCE_DIR}/single_include")
set(PCRE2_LIBRARY pcre2-8-static)  # these two bring their headers with them
set(UTF8PROC_LIBRARY utf8proc)

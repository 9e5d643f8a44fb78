# SPDX-License-Identifier: Apache-2.0
# Warnings for our own targets only; errors in developer mode only.
function(msa_set_warnings target)
  set(flags -Wall -Wextra -Wpedantic -Wconversion -Wshadow)
  if(MSA_DEVELOPER_MODE)
    list(APPEND flags -Werror)
  endif()
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX,C>:${flags}>)
endfunction()

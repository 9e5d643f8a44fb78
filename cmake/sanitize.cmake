# SPDX-License-Identifier: Apache-2.0
function(msa_set_sanitizers target)
  if(MSA_SANITIZE)
    set(flags -fsanitize=${MSA_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX,C>:${flags}>)
    target_link_options(${target} PUBLIC -fsanitize=${MSA_SANITIZE})
  endif()
endfunction()

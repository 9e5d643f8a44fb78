// SPDX-License-Identifier: Apache-2.0
#include <csignal>
#include <cstdio>
#include <exception>

#include "msa/backend.hpp"
#include "msa/error.hpp"
#include "tools/cli.hpp"

namespace {

void on_signal(int signal) {
  msa::tools::cancelled = true;
  std::signal(signal, SIG_DFL);  // a second Ctrl-C ends the program at once
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  CLI::App app{
      "msa: MiniMax Sparse Attention on this machine.\n\n"
      "Environment: MSA_BACKEND forces an implementation, MSA_VERBOSE=1 prints every plan,\n"
      "MSA_NUM_THREADS sets the CPU threads, MSA_CPU_TARGET caps the SIMD target."};
  app.set_version_flag("--version", msa::version());
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  int status = 0;
  msa::tools::add_info(app, status);
  msa::tools::add_verify(app, status);
  msa::tools::add_bench(app, status);
  msa::tools::add_run(app, status);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "msa: error: out of memory\n");
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "msa: error: %s\n", error.what());
    return 1;
  }
  return status;
}

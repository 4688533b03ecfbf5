// Does nothing: compiled, loaded and launched to see whether that can be done.
extern "C" __global__ void trial() {
  let_next_begin();
  wait_for_inputs();
}
